use super::*;

// prompts [1 2 3] [4], chosen [5] [6 7], rejected [8 9] [10]; the offsets of the chosen begin within their buffer
const OFFSETS: [&[i64]; 3] = [&[0, 3, 4], &[1, 2, 4], &[0, 2, 3]];
const PROMPT: [i32; 4] = [1, 2, 3, 4];
const CHOSEN: [i64; 4] = [99, 5, 6, 7];
const REJECTED: [i64; 3] = [8, 9, 10];
const IDS: [Ids<'_>; 3] = [Ids::I32(&PROMPT), Ids::I64(&CHOSEN), Ids::I64(&REJECTED)];

fn names() -> Vec<String> {
    ["prompt_ids", "chosen_ids", "rejected_ids"]
        .map(str::to_owned)
        .to_vec()
}

fn options(max_length: Option<usize>, keep: Keep, layout: Layout) -> Options {
    Options {
        max_length,
        keep,
        layout,
        shifted: false,
    }
}

/// input_ids, completion_mask, attention_mask and position_ids of a padded batch
fn padded(columns: usize, options: Options, pivot: Option<usize>, width: usize) -> [Vec<i64>; 4] {
    let names = names();
    let sequences =
        Sequences::new(&names[..columns], OFFSETS[..columns].to_vec(), options).unwrap();
    let mut lengths = vec![0; sequences.count()];
    sequences.lengths(&mut lengths).unwrap();
    let mut out = [(); 4].map(|()| vec![-7; sequences.count() * width]);
    let [input_ids, completion_mask, mask, positions] = &mut out;
    let batch = Batch {
        input_ids,
        completion_mask,
        attention_mask: Some(mask),
        position_ids: Some(positions),
    };
    let rows = Rows::Padded {
        rows: sequences.count(),
        width,
    };
    sequences
        .fill(&IDS[..columns], Slots { rows, pivot }, 0, batch, 2)
        .unwrap();
    out
}

#[test]
fn concatenated() {
    let [ids, completion, mask, _] =
        padded(3, options(None, Keep::Start, Layout::Concatenated), None, 5);
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
    let [ids, completion, ..] =
        padded(3, options(Some(2), Keep::End, Layout::Interleaved), None, 2);
    assert_eq!(ids, [3, 5, 8, 9, 6, 7, 4, 10]);
    assert_eq!(completion, [0, 1, 1, 1, 1, 1, 0, 1]);
}

#[test]
fn completions_begin_at_the_pivot() {
    let [ids, completion, mask, positions] = padded(
        2,
        options(None, Keep::Start, Layout::Concatenated),
        Some(3),
        6,
    );
    assert_eq!(ids, [1, 2, 3, 5, 0, 0, 0, 0, 4, 6, 7, 0]);
    assert_eq!(completion, [0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0]);
    assert_eq!(mask, [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0]);
    assert_eq!(positions, [0, 1, 2, 3, 0, 0, 0, 0, 0, 1, 2, 0]);
}

#[test]
fn shifted_completions_are_those_of_the_row_before() {
    let shifted = Options {
        shifted: true,
        ..options(None, Keep::Start, Layout::Concatenated)
    };
    let [ids, ..] = padded(2, shifted, None, 5);
    assert_eq!(ids, [1, 2, 3, 6, 7, 4, 5, 0, 0, 0]);
}

#[test]
fn packed_positions_restart() {
    let names = names();
    let options = options(Some(4), Keep::Start, Layout::Concatenated);
    let sequences = Sequences::new(&names, OFFSETS.to_vec(), options).unwrap();
    let mut lengths = vec![0; 4];
    sequences.lengths(&mut lengths).unwrap();
    assert_eq!(lengths, [4, 3, 4, 2]);
    let (mut input_ids, mut completion_mask, mut positions) =
        (vec![-7; 13], vec![-7; 13], vec![-7; 13]);
    let batch = Batch {
        input_ids: &mut input_ids,
        completion_mask: &mut completion_mask,
        attention_mask: None,
        position_ids: Some(&mut positions),
    };
    let slots = Slots {
        rows: Rows::Packed(&[0, 4, 7, 11, 13]),
        pivot: None,
    };
    sequences.fill(&IDS, slots, 0, batch, 1).unwrap();
    assert_eq!(input_ids, [1, 2, 3, 5, 4, 6, 7, 1, 2, 3, 8, 4, 10]);
    assert_eq!(completion_mask, [0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 0, 1]);
    assert_eq!(positions, [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 0, 1]);
}

#[test]
fn emptied_completions_are_named() {
    let names = names();
    let options = options(Some(3), Keep::Start, Layout::Interleaved);
    let sequences = Sequences::new(&names, OFFSETS.to_vec(), options).unwrap();
    let message = sequences.lengths(&mut [0; 4]).unwrap_err();
    assert!(message.starts_with(
        "max_length=3 leaves no completion token in chosen of row 0 and rejected of row 0:"
    ));
}

#[test]
fn a_negative_id_is_named() {
    let names = names();
    let offsets: [&[i64]; 3] = [&[0, 1, 2], &[0, 1, 2], &[0, 1, 3]];
    let named = |shifted| {
        let options = Options {
            shifted,
            ..options(None, Keep::Start, Layout::Concatenated)
        };
        let sequences = Sequences::new(&names, offsets.to_vec(), options).unwrap();
        let mut out = [(); 2].map(|()| vec![0; 12]);
        let [input_ids, completion_mask] = &mut out;
        let batch = Batch {
            input_ids,
            completion_mask,
            attention_mask: None,
            position_ids: None,
        };
        let rows = Rows::Padded { rows: 4, width: 3 };
        let ids = [Ids::I64(&[1, 2]), Ids::I64(&[3, 4]), Ids::I64(&[5, 6, -8])];
        let slots = Slots { rows, pivot: None };
        sequences.fill(&ids, slots, 0, batch, 1).unwrap_err()
    };
    for shifted in [false, true] {
        assert_eq!(
            named(shifted),
            "rejected_ids[1][1] must be a token id, got the negative number -8"
        );
    }
}

#[test]
fn unequal_columns_are_named() {
    let names = names();
    let offsets: Vec<&[i64]> = vec![&[0, 3, 4], &[1, 2], &[0, 2, 3]];
    let options = options(None, Keep::Start, Layout::Concatenated);
    let message = Sequences::new(&names, offsets, options).err().unwrap();
    assert_eq!(
        message,
        "prompt_ids, chosen_ids and rejected_ids must have the same number of rows, got 2, 1 and 2"
    );
}
