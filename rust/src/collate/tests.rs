use super::*;

// prompts [1 2 3] [4], chosen [5] [6 7], rejected [8 9] [10]; the offsets of the chosen begin within their buffer
const OFFSETS: [&[i64]; 3] = [&[0, 3, 4], &[1, 2, 4], &[0, 2, 3]];
const PROMPT: [i32; 4] = [1, 2, 3, 4];
const CHOSEN: [i64; 4] = [99, 5, 6, 7];
const REJECTED: [i64; 3] = [8, 9, 10];

fn padded(max_length: Option<usize>, keep: Keep, layout: Layout) -> [Vec<i64>; 3] {
    let pairs = Pairs::new(OFFSETS, max_length, keep, layout).unwrap();
    let mut lengths = vec![0; pairs.len()];
    pairs.lengths(&mut lengths).unwrap();
    let width = *lengths.iter().max().unwrap() as usize;
    let mut out = [(); 3].map(|()| vec![-7; 4 * width]);
    let [input_ids, completion_mask, mask] = &mut out;
    let batch = Batch {
        input_ids,
        completion_mask,
        tokens: Tokens::Mask(mask),
    };
    let ids = [Ids::I32(&PROMPT), Ids::I64(&CHOSEN), Ids::I64(&REJECTED)];
    pairs
        .fill(ids, Rows::Padded { rows: 4, width }, 0, batch, 2)
        .unwrap();
    out
}

#[test]
fn concatenated() {
    let [ids, completion, mask] = padded(None, Keep::Start, Layout::Concatenated);
    assert_eq!(
        ids,
        [1, 2, 3, 5, 0, 4, 6, 7, 0, 0, 1, 2, 3, 8, 9, 4, 10, 0, 0, 0]
    );
    assert_eq!(
        completion,
        [0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0]
    );
    assert_eq!(
        mask,
        [1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    );
}

#[test]
fn interleaved_and_cut_at_the_start() {
    let [ids, completion, _] = padded(Some(2), Keep::End, Layout::Interleaved);
    assert_eq!(ids, [3, 5, 8, 9, 6, 7, 4, 10]);
    assert_eq!(completion, [0, 1, 1, 1, 1, 1, 0, 1]);
}

#[test]
fn packed_positions_restart() {
    let pairs = Pairs::new(OFFSETS, Some(4), Keep::Start, Layout::Concatenated).unwrap();
    let mut lengths = vec![0; 4];
    pairs.lengths(&mut lengths).unwrap();
    assert_eq!(lengths, [4, 3, 4, 2]);
    let (mut input_ids, mut completion_mask, mut positions) =
        (vec![-7; 13], vec![-7; 13], vec![-7; 13]);
    let batch = Batch {
        input_ids: &mut input_ids,
        completion_mask: &mut completion_mask,
        tokens: Tokens::Positions(&mut positions),
    };
    let ids = [Ids::I32(&PROMPT), Ids::I64(&CHOSEN), Ids::I64(&REJECTED)];
    pairs
        .fill(ids, Rows::Packed(&[0, 4, 7, 11, 13]), 0, batch, 1)
        .unwrap();
    assert_eq!(input_ids, [1, 2, 3, 5, 4, 6, 7, 1, 2, 3, 8, 4, 10]);
    assert_eq!(completion_mask, [0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 0, 1]);
    assert_eq!(positions, [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 0, 1]);
}

#[test]
fn emptied_completions_are_named() {
    let pairs = Pairs::new(OFFSETS, Some(3), Keep::Start, Layout::Interleaved).unwrap();
    let message = pairs.lengths(&mut [0; 4]).unwrap_err();
    assert!(message.starts_with(
        "max_length=3 leaves no completion token in chosen of row 0 and rejected of row 0:"
    ));
}

#[test]
fn a_negative_id_is_named() {
    let pairs = Pairs::new(
        [&[0, 1, 2], &[0, 1, 2], &[0, 1, 3]],
        None,
        Keep::Start,
        Layout::Concatenated,
    )
    .unwrap();
    let mut out = [(); 3].map(|()| vec![0; 12]);
    let [input_ids, completion_mask, mask] = &mut out;
    let batch = Batch {
        input_ids,
        completion_mask,
        tokens: Tokens::Mask(mask),
    };
    let ids = [Ids::I64(&[1, 2]), Ids::I64(&[3, 4]), Ids::I64(&[5, 6, -8])];
    let message = pairs
        .fill(ids, Rows::Padded { rows: 4, width: 3 }, 0, batch, 1)
        .unwrap_err();
    assert_eq!(
        message,
        "rejected_ids[1][1] must be a token id, got the negative number -8"
    );
}
