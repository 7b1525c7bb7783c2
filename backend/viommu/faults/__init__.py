"""What goes wrong on purpose: the plan that says where and when, and the injector that carries it out.

The points themselves are next to the models that pass them. No model imports anything from here.
"""
