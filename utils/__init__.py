"""What the scripts share; each module imports only modules named before it in this list.

errors, runtime, files, options, augment, zca, datasets, reparam, trajectories, gradient_matching, formation,
idc_options, results, formats, synset, training, matching, report, progressive, idc, evaluation; the commands export
and download.
"""
