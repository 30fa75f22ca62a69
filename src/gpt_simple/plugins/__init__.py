"""The built-in plugins, one file each. They enter through entry points and use public names only, like a stranger's."""
