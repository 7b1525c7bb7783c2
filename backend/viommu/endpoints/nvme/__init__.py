"""An NVMe controller (NVM Express 1.4) with one namespace. It opens no file: its blocks are in a `BlockStore`.

controller.py     registers, doorbells, and the tasks that `step` takes forward
queues.py         submission and completion queues
prps.py, sgls.py  where a command's data is
admin.py, io.py   what commands do
"""
