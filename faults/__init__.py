"""How things go wrong: errors that end a command in one line, files that are whole or not there, locks, lasting streams."""
