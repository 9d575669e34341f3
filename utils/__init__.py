"""What the scripts share; each module imports only modules named before it in this list.

errors, runtime, files, pictures, originals, imagenet, augment, zca, datasets, options, reparam, trajectories,
gradient_matching, formation, idc_options, results, formats, synset, training, matching, report, progressive, idc,
evaluation, collect, figures; the commands export and download.
"""
