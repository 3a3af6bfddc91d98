# hf-tfm launch --on local --gpus 0 --processes 2 translation_train --config multi30k_tiny
ACCELERATE_USE_CPU=true python -m torch.distributed.run --standalone --nproc_per_node 2 -m hf_tfm.cli run translation_train --config multi30k_tiny
