"""``python -m gpt_simple`` is the same as the script, for starters of modules such as ``torchrun -m``."""

from gpt_simple.cli.main import main

if __name__ == "__main__":
    main()
