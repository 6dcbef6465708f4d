"""What a trained encoder is used for: each task is a head, a loss, samples and a metric, on the one
training loop.

config.py    a run's settings, and the recipes by name
randaugment.py, augment.py   pixels and labels, changed at random
clips.py     labelled clips for training, views of whole videos for tests
finetune.py  the run of a task;  classify.py  that of classes;  score.py  tests
"""
