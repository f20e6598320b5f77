"""Building blocks of models: linears, norms, attention, rotary, experts. They know config fields, no model's name."""
