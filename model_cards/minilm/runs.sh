# The runs behind these cards: MiniLM-L6 on GLUE, teachers and students. Finished runs are skipped.
# Usage: . runs.sh; once; seed 0; seed 1; seed 2; cards model_cards/minilm
# Needs, in the current folder: data/glue-{sst2,mrpc,rte,cola}, data/imdb-15k, data/gutenberg-novels and
# data/wikitext2-valid-test, folders of the data sets; runs/minilm_l6, MiniLM-L6 converted by hf-tfm convert --to tfm; an
# empty folder logs. $TFM is the command, for instance TFM="taskset -c 0 hf-tfm".
TFM=${TFM:-hf-tfm}
MORE="[{dataset_name: data/gutenberg-novels, split: train, text_column: text},{dataset_name: data/wikitext2-valid-test, split: validation, text_column: text},{dataset_name: data/wikitext2-valid-test, split: test, text_column: text},{dataset_name: data/glue-sst2, split: train, text_column: sentence}]"
run() {  # run FOLDER RECIPE OPTIONS ...: skipped if the folder has its results
    name=$1; shift
    [ -f "runs/$name/results.json" ] && return
    $TFM run "$@" --output_dir "runs/$name" --progress false > "logs/$name.log" 2>&1 && echo "$(date +%H:%M) $name" || { echo "FAILED $name"; tail -1 "logs/$name.log"; }
}
corpus() { name=$1; recipe=$2; preset=$3; shift 3; run "$name" "$recipe" --config "$preset" --dataset_name data/imdb-15k --dataset_config null --text_column text --documents true --max_train_samples null --validation_split null --holdout 300 --more_texts "$MORE" "$@"; }
sized() {  # options of a size
    case $1 in
        2x) set -- --model.intermediate_size 1536 ;;
        4x) set -- ;;
        10x) set -- --model.num_hidden_layers 1 --model.intermediate_size 576 --student_layers '[0]' ;;
    esac
    printf '%s\n' "$@"
}
epochs() { case $2 in sst2) echo "--num_train_epochs $1 --max_length 64";; esac; }
tests() { case $1 in sst2|mrpc) echo "--test_splits [test]";; esac; }
copies() { case $1 in sst2) echo 1;; cola) echo 4;; *) echo 2;; esac; }
TASKS=${TASKS:-sst2 mrpc rte cola}
SIZES=${SIZES:-2x 4x 10x}
teachers() { for t in $TASKS; do run minilm_$t-seed$1 text_classification_train --config glue_minilm --dataset_name "data/glue-{task}" --task $t $(epochs 2 $t) $(tests $t) --seed $1; done; }
general() {
    corpus minilm_mlm language_pretrain minilm_mlm
    for s in $SIZES; do for way in distilbert tinybert; do
        corpus ${way}_$s distill_pretrain minilm_$way --costs false $(sized $s | tr '\n' ' ')
    done; done
}
augment() { for t in $TASKS; do [ -d data/$t-augmented ] || $TFM run augment_texts --dataset_name "data/glue-$t" --task $t --model runs/minilm_mlm --substitution.copies $(copies $t) --batch_tokens 4096 --mixed_precision bf16 --output_dir data/$t-augmented --progress false > logs/augment_$t.log 2>&1 && echo "$(date +%H:%M) augmented $t"; done; }
students() {
    for t in $TASKS; do for s in $SIZES; do
        o="--task $t --teacher runs/minilm_{task}-seed0 $(tests $t) --seed $1"
        run distilbert_${s}_$t-seed$1 distill_task --config minilm_distilbert --dataset_name "data/glue-{task}" --model_name_or_path runs/distilbert_$s $o $(epochs 2 $t)
        run tinybert_${s}_${t}_intermediate-seed$1 distill_task --config minilm_tinybert_intermediate --model_name_or_path runs/tinybert_$s --costs false $o $(epochs 1 $t)
        run tinybert_${s}_$t-seed$1 distill_task --config minilm_tinybert_prediction --model_name_or_path runs/tinybert_${s}_${t}_intermediate-seed$1 $o $(epochs 1 $t)
    done; done
}
once() { teachers 0; general; augment; }
seed() { teachers $1; students $1; }
cards() {  # cards FOLDER: copy the cards of finished runs
    mkdir -p "$1"
    for r in runs/minilm_*-seed? runs/distilbert_* runs/tinybert_* runs/minilm_mlm; do
        n=${r#runs/}
        case $n in *_intermediate-seed?) continue;; esac
        [ -f $r/results.json ] || continue
        cp $r/results.json $1/$n.json; sed "s/(training_curve.png)/($n.png)/" $r/README.md > $1/$n.md
        [ -f $r/training_curve.png ] && cp $r/training_curve.png $1/$n.png
    done
}
