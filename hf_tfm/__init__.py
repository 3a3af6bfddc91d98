"""The classic Transformer family for the Hugging Face ecosystem.

Importing this package registers its configurations and models with transformers' Auto classes. The exported classes
come from the table in `families`; __init__.pyi lists them for type checkers.
"""

from .families import carry_code, exports, register

__version__ = "0.1.0"

globals().update(exports())
__all__ = [*sorted(exports()), "carry_code", "register"]

register()
