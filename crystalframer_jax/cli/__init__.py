"""The commands behind scripts/: arguments, what they print, errors in one line."""
