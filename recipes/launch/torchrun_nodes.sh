# hf-tfm launch --on local --nodes 2 --gpus 8 --master node0 --max_restarts 3 translation_train --config wmt14_big
python -m torch.distributed.run --nnodes 2 --rdzv_backend c10d --rdzv_endpoint node0:29500 --rdzv_id translation-train-wmt14-big --nproc_per_node 8 --max_restarts 3 -m hf_tfm.cli run translation_train --config wmt14_big
