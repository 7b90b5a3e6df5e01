"""`python -m hsrloop`."""

from hsrloop.cli.main import main

if __name__ == "__main__":
    main(prog_name="hsrloop")
