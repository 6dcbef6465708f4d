"""Actions of persons in movies (AVA 2.2): a label for each box at each second.

evaluate.py  mAP at 0.5 IoU, as the official evaluations compute it
files.py     the official csv files and label list, and what is wrong with them
boxes.py     boxes through crops and flips;  clips.py  clips around keyframes
model.py     the encoder with a head on boxes;  run.py  fine-tuning;  score.py  tests, pictures
"""
