"""The intermediate representation: levels, and how graphs are read, edited and printed."""
