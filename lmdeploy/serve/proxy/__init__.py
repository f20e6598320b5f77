"""Several servers of several models behind one address. It loads no model and knows none."""
