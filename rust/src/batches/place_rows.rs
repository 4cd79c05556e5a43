//! Ragged rows as the rows of a padded batch.

use crate::rows::Rows;

/// Copies the values of each row into its row of `out` [B, `width`], from the column `starts[row]` on, and `blank` into
/// the other cells.
pub fn place_rows<T: Copy + Send + Sync>(
    values: &[T],
    offsets: &[i64],
    starts: &[i64],
    (width, blank): (usize, T),
    out: &mut [T],
    threads: usize,
) -> Result<(), String> {
    let rows = Rows::packed("offsets", offsets, values.len())?;
    let grid = Rows::Padded {
        rows: rows.count(),
        width,
    };
    if starts.len() != rows.count() || out.len() != rows.count() * width {
        return Err("starts and out must have the rows of offsets".to_owned());
    }
    for (row, &start) in starts.iter().enumerate() {
        let length = rows.range(row).len();
        if start < 0 || start as usize + length > width {
            return Err(format!(
                "row {row} has {length} values from column {start} on, of {width} columns"
            ));
        }
    }
    let bytes = 2 * size_of_val(out);
    grid.each(out, bytes, threads, |row, cells| {
        let values = &values[rows.range(row)];
        let begin = starts[row] as usize;
        let end = begin + values.len();
        cells[..begin].fill(blank);
        cells[begin..end].copy_from_slice(values);
        cells[end..].fill(blank);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_placed_from_their_start_on() {
        let mut out = vec![-7; 8];
        place_rows(&[1, 2, 3], &[0, 2, 3], &[1, 3], (4, 0), &mut out, 1).unwrap();
        assert_eq!(out, [0, 1, 2, 0, 0, 0, 0, 3]);
        let message = place_rows(&[1, 2, 3], &[0, 2, 3], &[3, 3], (4, 0), &mut out, 1).unwrap_err();
        assert_eq!(message, "row 0 has 2 values from column 3 on, of 4 columns");
        assert!(place_rows(&[1, 2, 3], &[0, 2, 3], &[-1, 3], (4, 0), &mut out, 1).is_err());
    }
}
