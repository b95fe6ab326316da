// What C++ and Python share: one plain struct, mirrored field by field in lammps_data.py.
//
// Python receives its address and views the arrays in place with ctypes and numpy; nothing is
// copied. Pointers are valid during one call only. Both sides compare struct_size before use.
// Row k of the pair list belongs to atom ilist[k]; senders are LAMMPS atom indices (local atoms
// 0 .. nlocal-1, then ghosts up to ntotal-1), with the skin of the neighbour list included.

#ifndef MD_PLUGIN_MLIAP_VIEW_H
#define MD_PLUGIN_MLIAP_VIEW_H

#include <cstdint>

struct MLIAPView {
  int32_t struct_size;

  // fixed when the pair style is created
  int32_t lammps_version;    // 20250722
  int32_t rank, nranks;
  int32_t ranks_on_node, node_rank;
  int32_t owns_process;    // 1 where this plugin started Python inside lmp
  int32_t mpi_gpu_aware;    // 1 yes, 0 no, -1 the MPI library does not say
  const char *mpi_library;
  const char *units;
  void *pair;    // handed back to the callbacks

  // answered by Python when the model is loaded
  double rcut;           // largest distance between interacting atoms, LAMMPS length unit
  int32_t comm_width;    // largest number of features per atom in one exchange; 0: no exchange
  int32_t centroid;      // 1: the model knows its centroid virials
  int32_t n_models;      // members of a committee; 1 for a single model
  int32_t finds_pairs;   // 1: the model finds pairs by itself; the list is made when asked for
  int32_t ghostneigh;    // read: 1 where the script asks for neighbours of ghosts
  char info[512];        // one line for the log: which model, on what

  // pair_coeff: Python fills type_map[0 .. ntypes-1] with element indices, -1 for NULL
  int32_t ntypes;
  int32_t *type_map;

  // one time step: read
  int32_t nlocal, ntotal, nlist;
  int32_t eflag, vflag;
  int64_t list_count;          // grows by one each time the pair list below was rebuilt
  int64_t step;
  int64_t n_pair;              // pairs of the list, skin included; after list_pairs
  int32_t whole_list;          // 1: the list would be all pairs of local atoms, and is not made
  double skin;                 // of the list, LAMMPS length unit
  int32_t want_std;            // 1: force_std and energy_std are asked for
  int32_t want_centroid;       // 1: cvatom is asked for, on every rank
  const double *x;             // (ntotal, 3)
  int32_t tag_bytes;           // of one tag, 4 or 8
  const void *tag;             // (ntotal,) global ids; null where the atoms have none
  const int32_t *elems;        // (ntotal,) element index, -1 for NULL types
  const int32_t *ilist;        // (nlist,)
  const int32_t *row_ptr;      // (nlist + 1,), after list_pairs
  const int32_t *sender;       // (n_pair,), after list_pairs

  // one time step: written
  double *f;         // (ntotal, 3), added to
  double *eatoms;    // (nlist,), zero at the start
  double energy;
  double virial[6];    // xx yy zz xy xz yz, zero at the start
  double *vatom;       // (ntotal, 6), added to; null unless per-atom virials are wanted
  double *cvatom;      // (ntotal, 9) xx yy zz xy xz yz yx zx zy, added to; null unless wanted
  double *force_std, *energy_std;    // (nlocal,), zero at the start; null unless want_std
  int64_t exchange_missing;      // after the first step: sums to 0 over all ranks, or ghosts are lost
  char header[160], row[160];    // after the first step: one row of the table of ranks

  // pairs inside the cutoff, for objects that ask for LAMMPS's own arrays (inside_pairs)
  int64_t n_inside;
  const int32_t *inside_row;    // (n_inside,) row of the pair
  const int32_t *inside_i;      // (n_inside,) atom index of the receiver
  const int32_t *inside_j;      // (n_inside,) atom index of the sender
  const int32_t *numneighs;     // (nlist,)
  const double *inside_rij;     // (n_inside, 3) x[j] - x[i]

  // callbacks: 0 for success, otherwise error_text says why
  int32_t (*list_pairs)(void *pair);    // makes row_ptr and sender where they are not there yet
  int32_t (*inside_pairs)(void *pair);
  int32_t (*pair_forces)(void *pair, const double *fij);
  int32_t (*exchange)(void *pair, int32_t reverse, void *rows, int64_t row_bytes,
                      int64_t first_byte, int32_t n_bytes, int32_t item_bytes);
  const char *error_text;
};

#endif
