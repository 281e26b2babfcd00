"""The same training in several libraries, each as a user who knows that library well would write it.

A contestant is a module with `trainer(work, x, **options)`, which gives a function of no arguments: it trains for one
epoch over the images `x` and returns the mean loss in nats per datum.
"""
