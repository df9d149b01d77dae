"""Images, preprocessing, labelled data sets and class names."""
