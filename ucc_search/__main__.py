"""`python -m ucc_search`."""

from ucc_search.cli import main

if __name__ == "__main__":
    main()
