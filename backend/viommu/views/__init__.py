"""What can be seen from outside while the server runs: methods of the control socket that look, and change nothing.

What guest memory says is read by the SMMU's own code, in caches of its own. Every answer is bounded, whatever the guest
wrote: a list that is cut says where it goes on.
"""
