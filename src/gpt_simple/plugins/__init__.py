"""The built-in plugins, one file each. As external ones they enter through entry points and use public names only."""
