"""Invalid inputs of every recipe and command as a table; see `rows` and `runner`."""
