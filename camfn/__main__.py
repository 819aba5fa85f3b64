"""`python -m camfn` is the command `camfn`."""

from camfn.cli import main

if __name__ == "__main__":
    main()
