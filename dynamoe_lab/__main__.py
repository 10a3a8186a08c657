"""`python -m dynamoe_lab` is the command `dynamoe-lab`."""

from dynamoe_lab.workbench.cli import main

if __name__ == "__main__":
    main()
