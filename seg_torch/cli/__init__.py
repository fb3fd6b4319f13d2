"""The command line: words to a composed and checked configuration, and the call of a command."""

from seg_torch.cli.main import main as main
