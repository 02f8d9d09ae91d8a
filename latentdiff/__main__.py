"""Entry point of `python -m latentdiff` and `accelerate launch -m latentdiff`."""

from .cli import main

if __name__ == "__main__":
    main()
