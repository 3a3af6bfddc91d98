"""Train a model to predict the next frames of a video: a convolutional LSTM (Shi et al. 2015, arXiv:1506.04214) or a
video Transformer.

    hf-tfm run video_forecasting_train --config quickstart             about a minute on a CPU core
    hf-tfm run video_forecasting_train --config moving_digits          Moving MNIST from scikit-learn's digits
    hf-tfm run video_forecasting_train --config moving_digits_transformer
    hf-tfm run video_forecasting_train --config moving_mnist           the paper's network, at its size
    hf-tfm run video_forecasting_train --config moving_digits --dataset_name DATA --moving_images null

DATA is any data set with a column of videos: lists of images, animated images or video files. Presets with their cost
and expected results: recipes/presets/video_forecasting_train/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.video_forecasting import VideoForecastingTask
from hf_tfm.training.trainer import recipe

main = recipe(VideoForecastingTask, __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
