"""The command line as ``python -m wanforge``."""

from wanforge.cli import main

if __name__ == "__main__":
    main()
