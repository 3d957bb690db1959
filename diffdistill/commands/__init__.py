"""The commands, from Python and from a shell."""
