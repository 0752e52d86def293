"""A fuzzer: changes foreign files and rows at random, gives them to the public commands, and counts what happens."""
