//! Defect pictures: image, heat map, record; durable, bounded.
