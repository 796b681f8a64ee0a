"""The kinds of node, one file each: what a kind may say, what it makes of forms, and what it does when it runs."""
