include "_fast.pyx"
