"""``python -m gpt_simple``: what the script does; the form that torchrun starts with ``-m``."""

from gpt_simple.cli.main import main

if __name__ == "__main__":
    main()
