"""How things go wrong, and files that survive it: the errors that end a command in one line, whole-file writes."""
