"""What the architecture lays out bit by bit: registers, tables, commands and event records.

Here live layouts and their constants, and nothing that acts on them. Standard library only: the same files run in
the guest.
"""
