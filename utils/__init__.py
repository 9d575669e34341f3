"""What the scripts share; each module imports only modules named before it in this list.

errors, runtime, files, options, augment, zca, datasets, reparam, trajectories, synset, training, matching,
gradient_matching, formation, idc_options, report, progressive, idc, evaluation, collect, figures.
"""
