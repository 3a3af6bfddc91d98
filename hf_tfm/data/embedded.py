"""Names of the data sets that are generated or come with another package."""

DIGIT_SCENES = {"digit-scenes": 2000, "digit-scenes-large": 6000}  # training scenes; the others are the same in both
EMBEDDED = ("number-words", "digits", *DIGIT_SCENES)
