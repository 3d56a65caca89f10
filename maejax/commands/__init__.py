"""The verbs of the command line, a module each: `run(arguments)` parses them and calls one function.

The first line of a module's docstring is the verb's description, the rest its examples.
"""
