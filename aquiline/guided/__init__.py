"""Texts of a given form: grammars, and the tokens they allow at every node of a tree."""
