"""``python -m saetrack``, which is also how Lightning starts further processes."""

from saetrack.cli import main

if __name__ == "__main__":
    main()
