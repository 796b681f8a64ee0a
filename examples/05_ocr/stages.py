"""What happens between the three models of RapidOCR: the package's own functions, as functions from arrays to arrays.

Crops of different sizes travel as the pixels of all of them `(P, 3)`, one after the other, and their heights and widths
`(K, 2)`. K, how many lines of text there are, may be 0.
"""

import functools
import os

import numpy as np
from rapidocr_onnxruntime import RapidOCR
from rapidocr_onnxruntime.ch_ppocr_cls import TextClassifier
from rapidocr_onnxruntime.ch_ppocr_cls.utils import ClsPostProcess
from rapidocr_onnxruntime.ch_ppocr_det import TextDetector
from rapidocr_onnxruntime.ch_ppocr_det.utils import DBPostProcess
from rapidocr_onnxruntime.ch_ppocr_rec import TextRecognizer
from rapidocr_onnxruntime.ch_ppocr_rec.utils import CTCLabelDecode
from rapidocr_onnxruntime.main import DEFAULT_CFG_PATH
from rapidocr_onnxruntime.utils import read_yaml

from remote_ops import load

CONFIG = read_yaml(DEFAULT_CFG_PATH)
DETECTION, DIRECTION, RECOGNITION = [DEFAULT_CFG_PATH.parent / CONFIG[of]["model_path"] for of in ("Det", "Cls", "Rec")]


def without_model(kind, **settings):
    """An object of the package with its settings, but without the model that its constructor would load."""
    made = kind.__new__(kind)
    vars(made).update(settings)
    return made


READER = without_model(RapidOCR, **CONFIG["Global"])
DETECTOR = without_model(TextDetector, **CONFIG["Det"])
CLASSIFIER = without_model(TextClassifier, **CONFIG["Cls"])
RECOGNIZER = without_model(TextRecognizer, rec_image_shape=CONFIG["Rec"]["rec_img_shape"])
FIND_BOXES = DBPostProcess(**{key: CONFIG["Det"][key] for key in DBPostProcess.__init__.__annotations__})
FIND_LABELS = ClsPostProcess(CONFIG["Cls"]["label_list"])


def direction():
    """The model that tells whether a line is upside down: the one of the three that runs here."""
    return load(DIRECTION, threads=os.cpu_count())


@functools.cache
def find_text():
    """Reads the classes of the recognition model, whose meaning only its file tells."""
    return CTCLabelDecode(load(RECOGNITION).metadata["character"].splitlines())


def page(picture):
    """A picture of a size that the models can read, and how it was made: two ratios, and the top and left margin."""
    resized, *ratios = READER.preprocess(picture)
    framed, made = READER.maybe_add_letterbox(resized, {})
    return framed, np.array([*ratios, made["padding_1"]["top"], made["padding_1"]["left"]])


def detection_input(page):
    """`(H, W, 3)` -> `(1, 3, H', W')`, with H' and W' multiples of 32."""
    return DETECTOR.get_preprocess(max(page.shape[:2]))(page)


def boxes(page, likely):
    """The corners `(K, 4, 2)` of the lines of text, in the order of reading."""
    found, _ = FIND_BOXES(likely, page.shape[:2])
    found = DETECTOR.filter_tag_det_res(found, page.shape[:2])
    return np.array(READER.sorted_boxes(found), np.float32).reshape(-1, 4, 2)


def crops(page, boxes):
    """Each line of text by itself: all pixels, the sizes, and the order from the narrowest to the widest shape."""
    cut = READER.get_crop_img_list(page, boxes)
    pixels = np.concatenate([np.empty((0, 3), np.uint8), *[crop.reshape(-1, 3) for crop in cut]])
    sizes = np.array([crop.shape[:2] for crop in cut], np.int64).reshape(-1, 2)
    return pixels, sizes, np.argsort(sizes[:, 1] / sizes[:, 0])


def chosen(pixels, sizes, rows):
    """Views of some of the crops."""
    ends = np.cumsum(sizes.prod(1))
    return [pixels[ends[row] - sizes[row].prod() : ends[row]].reshape(*sizes[row], 3) for row in rows]


def direction_input(pixels, sizes, rows):
    """Some crops as the direction model takes them: `(R, 3, 48, 192)`."""
    return np.stack([CLASSIFIER.resize_norm_img(crop) for crop in chosen(pixels, sizes, rows)])


def recognition_input(pixels, sizes, rows, directions):
    """The same crops, those upside down turned, as the recognition model takes them: `(R, 3, 48, W)`."""
    upright = [
        np.rot90(crop, 2) if label == "180" and score > CLASSIFIER.cls_thresh else crop
        for crop, (label, score) in zip(chosen(pixels, sizes, rows), FIND_LABELS(directions), strict=True)
    ]
    _, height, width = RECOGNIZER.rec_image_shape
    widest = max(width / height, *[w / h for h, w in sizes[rows].tolist()])
    return np.stack([RECOGNIZER.resize_norm_img(crop, widest) for crop in upright])


def lines(likely):
    """Classes `(R, T, 6625)` as text and its score, each `(R,)`."""
    text, score = zip(*find_text()(likely), strict=True)
    return np.array([line.encode() for line in text], object), np.array(score)


def reading(picture, making, boxes, order, text, score):
    """What is surely read, in the order of reading: where in the picture, what, and how surely."""
    ratio_h, ratio_w, top, left = making.tolist()
    made = {"preprocess": {"ratio_h": ratio_h, "ratio_w": ratio_w}, "padding_1": {"top": top, "left": left}}
    placed = READER._get_origin_points(boxes, made, *picture.shape[:2])
    back = np.argsort(order)
    kept, read = READER.filter_result(list(placed), list(zip(text[back], score[back], strict=True)))
    text, score = zip(*read, strict=True) if read else ((), ())
    return np.array(kept, np.float32).reshape(-1, 4, 2), np.array(text, object), np.array(score, np.float64)
