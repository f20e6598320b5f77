"""HTTP over the asynchronous engine: the extra `serve`. Nothing below it imports it.

`lmdeploy.serve(model)` starts a server, as it did up to version 0.9. The name is that of this package as well, so the package
can be called; what the call does is `launch`'s matter.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmdeploy.serve.launch import ServedModel


class _CallablePackage(ModuleType):
    def __call__(self, model_path: str | None = None, *args: Any, **kwargs: Any) -> ServedModel:
        """See lmdeploy.serve.launch.serve."""
        from lmdeploy.serve.launch import serve

        return serve(model_path, *args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
