"""`python -m latentdiff`, which `accelerate launch -m latentdiff train` starts."""

from .cli import main

if __name__ == "__main__":
    main()
