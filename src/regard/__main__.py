"""`python -m regard`, and so `torchrun --nproc-per-node 2 -m regard watch ...`."""

from regard.cli import main

if __name__ == "__main__":
    main()
