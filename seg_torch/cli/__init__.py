"""The command line: words to a composed and checked configuration, and the call of a command."""
