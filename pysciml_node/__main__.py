"""The command line: `python -m pysciml_node COMMAND`."""

from pysciml_node.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
