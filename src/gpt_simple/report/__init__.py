"""The HTML file that ``gpt-simple report`` writes about one run or several. It needs no torch and no network."""
