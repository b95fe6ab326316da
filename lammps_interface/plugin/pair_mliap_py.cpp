// Implements pair_mliap_py.h: settings, time step, results. What Python calls back for is in
// callbacks.cpp, the feature exchange in exchange.cpp, the table of ranks and what fix pair reads in
// report.cpp.

#include "pair_mliap_py.h"

#include "atom.h"
#include "comm.h"
#include "error.h"
#include "force.h"
#include "memory.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "universe.h"
#include "update.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <dlfcn.h>
#include <numeric>
#include <thread>

using namespace LAMMPS_NS;

PairMLIAPPy::PairMLIAPPy(LAMMPS *lmp) :
    Pair(lmp), view(), ranks_printed(false), seen(nullptr), rows_of(nullptr), force_std_flag(0),
    energy_std_flag(0), std_asked(false), std_flagged(false), inside_known(false), rows(nullptr),
    row_bytes(0), n_bytes(0), item_bytes(0), n_slots(0)
{
  single_enable = 0;
  restartinfo = 0;
  one_coeff = 1;
  manybody_flag = 1;
  respa_enable = 0;
  unit_convert_flag = 0;
  no_virial_fdotr_compute = 1;    // the virial comes from the pair vectors, explicitly
  centroidstressflag = CENTROID_NOTAVAIL;

  view.struct_size = sizeof(MLIAPView);
  view.lammps_version = lmp->num_ver;
  view.rank = comm->me;
  view.nranks = comm->nprocs;
  view.pair = this;
  set_callbacks();
}

PairMLIAPPy::~PairMLIAPPy()
{
  if (allocated) {
    memory->destroy(setflag);
    memory->destroy(cutsq);
  }
}

// Runs what every rank does at the same time; if it fails anywhere, every rank stops with the
// message of the first rank that failed. Not for compute(): there, other ranks may be waiting
// in an exchange.
void PairMLIAPPy::together(const std::function<void()> &body)
{
  std::string text;
  try {
    body();
  } catch (const mdp::PythonError &e) {
    text = e.what();
    if (text.empty()) text = "Python failed without a message";
  }
  int mine = text.empty() ? comm->nprocs : comm->me, first = 0;
  MPI_Allreduce(&mine, &first, 1, MPI_INT, MPI_MIN, world);
  if (first == comm->nprocs) return;
  int length = static_cast<int>(text.size());
  MPI_Bcast(&length, 1, MPI_INT, first, world);
  text.resize(length);
  MPI_Bcast(&text[0], length, MPI_CHAR, first, world);
  error->all(FLERR, "pair_style mliap/py: {}", text);
}

// A failure of this rank inside a time step. Other ranks may wait in an exchange, and an
// exception would leave them there, so the whole run is aborted once the message is out.
void PairMLIAPPy::stop(const std::string &text)
{
  if (universe->nprocs == 1) error->all(FLERR, "pair_style mliap/py: {}", text);
  const std::string line = "ERROR on proc " + std::to_string(universe->me) +
      ": pair_style mliap/py: " + text + "\n";
  fputs(line.c_str(), stderr);
  if (logfile) fputs(line.c_str(), logfile);
  fflush(nullptr);
  // mpiexec kills its output forwarders at once, with whatever they still hold
  std::this_thread::sleep_for(std::chrono::seconds(1));
  MPI_Abort(universe->uworld, 1);
  std::abort();    // MPI_Abort does not return
}

void PairMLIAPPy::allocate()
{
  const int n = atom->ntypes + 1;
  memory->create(setflag, n, n, "pair:setflag");
  memory->create(cutsq, n, n, "pair:cutsq");
  type_map.assign(atom->ntypes, -1);
  allocated = 1;
}

void PairMLIAPPy::settings(int narg, char **arg)
{
  if (narg < 2 || strcmp(arg[0], "unified") != 0)
    error->all(FLERR, "pair_style mliap/py takes: unified FILE; for other kinds of mliap models "
                      "use pair_style mliap without the suffix py");
  if (narg > 3) error->all(FLERR, "pair_style mliap/py unified FILE: unexpected '{}'", arg[3]);
  view.ghostneigh = narg == 3 && utils::logical(FLERR, arg[2], false, lmp);

  MPI_Comm node;
  MPI_Comm_split_type(world, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node);
  MPI_Comm_size(node, &view.ranks_on_node);
  MPI_Comm_rank(node, &view.node_rank);
  MPI_Comm_free(&node);
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length;
  MPI_Get_library_version(text, &length);
  mpi_library = std::string(text, std::min<size_t>(strcspn(text, "\r\n"), 60));
  view.mpi_library = mpi_library.c_str();
  auto gpu_aware = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "MPIX_Query_cuda_support"));
  view.mpi_gpu_aware = gpu_aware ? gpu_aware() : -1;
  view.units = update->unit_style;
  together([&] {
    mdp::start_python();
    view.owns_process = mdp::owns_interpreter();
    session.create("lammps_interface.session", "open_session", &view, arg[1]);
  });
  // One rank of each node compiles what the disk does not hold yet; the others read it then.
  together([&] { if (view.node_rank == 0) session.call("warm_up", ""); });
  together([&] { if (view.node_rank != 0) session.call("warm_up", ""); });

  if (comm->me == 0) utils::logmesg(lmp, "mliap/py: {}\n", view.info);

  // LAMMPS sizes its communication buffers from these when it initialises
  comm_forward = comm_reverse = view.comm_width;
  centroidstressflag = view.centroid ? CENTROID_AVAIL : CENTROID_NOTAVAIL;
  ranks_printed = false;
}

void PairMLIAPPy::coeff(int narg, char **arg)
{
  if (!allocated) allocate();
  const int ntypes = atom->ntypes;
  if (narg < 2 || strcmp(arg[0], "*") != 0 || strcmp(arg[1], "*") != 0)
    error->all(FLERR, "pair_coeff for mliap/py must start with * *");
  if (narg != ntypes + 2)
    error->all(FLERR,
               "pair_coeff * * for mliap/py needs one element, or NULL, for each of the {} atom "
               "types; got {}", ntypes, narg - 2);

  std::string names;
  for (int i = 2; i < narg; i++) names += std::string(arg[i]) + " ";
  view.ntypes = ntypes;
  view.type_map = type_map.data();
  together([&] { session.call("coeff", names.c_str()); });
  for (int i = 1; i <= ntypes; i++)
    if (type_map[i - 1] < 0 && force->pair == this)
      error->all(FLERR, "atom type {} is mapped to NULL; that is for types that another pair style "
                        "handles (pair_style hybrid)", i);

  for (int i = 1; i <= ntypes; i++)
    for (int j = i; j <= ntypes; j++)
      setflag[i][j] = (type_map[i - 1] >= 0 && type_map[j - 1] >= 0);
}

void PairMLIAPPy::init_style()
{
  if (!force->newton_pair)
    error->all(FLERR, "pair_style mliap/py requires newton pair on: put 'newton on' at the top "
                      "of the script");
  check_special_bonds();
  // an occasional list is made when it is asked for
  const bool found = view.finds_pairs && force->pair == this;
  neighbor->add_request(this,
                        NeighConst::REQ_FULL | (found ? NeighConst::REQ_OCCASIONAL : 0));
  seen = rows_of = nullptr;
}

// LAMMPS leaves bonded neighbours with a weight of zero, its default, out of the list. A network
// needs every neighbour, and would be silently wrong without them.
void PairMLIAPPy::check_special_bonds()
{
  if (atom->molecular == Atom::ATOMIC || atom->nbonds == 0) return;
  bool dropped = false;
  for (int k = 1; k <= 3; k++)
    if (force->special_lj[k] == 0.0 && force->special_coul[k] == 0.0) dropped = true;
  if (!dropped) return;
  const char *text = "pair_style mliap/py: bonded neighbours are left out of the neighbour list; "
                     "write 'special_bonds lj/coul 1 1 1' if the model describes these bonds";
  if (force->pair == this) error->all(FLERR, text);
  if (comm->me == 0) error->warning(FLERR, text);
}

double PairMLIAPPy::init_one(int i, int j)
{
  if (!setflag[i][j]) error->all(FLERR, "pair_coeff is missing for atom types {} and {}", i, j);
  return view.rcut;
}

void PairMLIAPPy::fill_view(int eflag, int vflag)
{
  const int ntotal = atom->nlocal + atom->nghost;
  // Where Python finds the pairs, LAMMPS lists them only when it is asked to, or where the list is
  // not simply all pairs.
  view.whole_list = list->occasional && !neighbor->exclude && !neighbor->includegroup;
  const int nlist = view.whole_list ? atom->nlocal : list->inum;
  if (neighbor->ago == 0 || seen != list || view.nlist != nlist || view.ntotal != ntotal ||
      view.nlocal != atom->nlocal) {
    rows_of = nullptr;
    seen = list;
    view.list_count++;
    if (!view.whole_list) list_pairs();
  }
  if (view.whole_list && local.size() != static_cast<size_t>(nlist)) {
    local.resize(nlist);
    std::iota(local.begin(), local.end(), 0);
  }
  view.nlist = view.whole_list ? nlist : list->inum;
  view.ilist = view.whole_list ? local.data() : list->ilist;
  view.skin = neighbor->skin;

  elems.resize(ntotal);
  for (int i = 0; i < ntotal; i++) elems[i] = type_map[atom->type[i] - 1];
  eatoms.assign(view.nlist, 0.0);
  inside_known = false;

  view.nlocal = atom->nlocal;
  view.ntotal = ntotal;
  view.eflag = eflag;
  view.vflag = vflag;
  view.step = update->ntimestep;
  view.want_std = force_std_flag || energy_std_flag || (std_asked && !std_flagged);
  if (view.want_std) {
    force_std.assign(atom->nlocal, 0.0);
    energy_std.assign(atom->nlocal, 0.0);
  }
  view.force_std = view.want_std ? force_std.data() : nullptr;
  view.energy_std = view.want_std ? energy_std.data() : nullptr;
  view.x = ntotal ? atom->x[0] : nullptr;
  view.f = ntotal ? atom->f[0] : nullptr;
  view.tag_bytes = sizeof(tagint);
  view.tag = atom->tag_enable ? atom->tag : nullptr;
  view.elems = elems.data();
  view.eatoms = eatoms.data();
  view.energy = 0.0;
  std::fill(view.virial, view.virial + 6, 0.0);
  view.vatom = (vflag_atom && ntotal) ? vatom[0] : nullptr;
  view.want_centroid = cvflag_atom;
  view.cvatom = (cvflag_atom && ntotal) ? cvatom[0] : nullptr;
  view.n_inside = 0;
}

void PairMLIAPPy::compute(int eflag, int vflag)
{
  ev_init(eflag, vflag);
  fill_view(eflag, vflag);
  try {
    session.call("compute", "");
  } catch (const mdp::PythonError &e) {
    stop(e.what());
  }
  tally();
  if (!ranks_printed) print_ranks();
}

void PairMLIAPPy::tally()
{
  if (eflag_global) eng_vdwl += view.energy;
  if (eflag_atom)
    for (int k = 0; k < view.nlist; k++) eatom[view.ilist[k]] += eatoms[k];
  if (vflag_global)
    for (int k = 0; k < 6; k++) virial[k] += view.virial[k];
}

double PairMLIAPPy::memory_usage()
{
  double bytes = Pair::memory_usage();
  for (const auto *v : {&row_ptr, &sender, &local, &elems, &inside_row, &inside_i, &inside_j, &numneighs})
    bytes += static_cast<double>(v->capacity()) * sizeof(int);
  bytes += static_cast<double>(eatoms.capacity() + inside_rij.capacity()) * sizeof(double);
  return bytes;
}
